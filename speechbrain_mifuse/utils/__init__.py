"""What every room may use: files, audio, errors, progress, texts."""
