"""SpeechBrain `Brain` subclasses."""
