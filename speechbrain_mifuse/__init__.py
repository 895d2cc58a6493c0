"""Speech emotion recognition methods as SpeechBrain recipes: source-free adaptation with an audio language model."""

__version__ = "0.1.0"
