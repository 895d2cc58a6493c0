"""Zero-shot emotion scores: audio against prompts, in one space."""

# The value of --teacher with which an audio-text model, the one that --teacher_alm names, answers instead of an API.
AUDIO_TEXT_TEACHER = "dual_encoder"
