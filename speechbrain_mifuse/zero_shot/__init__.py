"""Zero-shot emotion scores: audio against prompts, in one space."""

# The value of --teacher that takes an audio-text model in the place of an API.
ZERO_SHOT = "dual_encoder"
