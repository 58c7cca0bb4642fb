"""What a run needs before it starts: memory, communication, the time of a step."""
