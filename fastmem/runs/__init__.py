"""The run folder and what a run needs to stop and to go on."""
