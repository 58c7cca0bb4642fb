"""What a run needs before it starts: memory, bytes on the wire, the time of a step."""
