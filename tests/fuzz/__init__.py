"""Files made to harm, by the hundred thousand: valid ones that are changed where it hurts. ``python -m tests.fuzz``."""
