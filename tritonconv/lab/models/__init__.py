"""Whole models: where the time of a training step goes, and the step with torch's layers beside the converted one."""
