"""What must not move: a recording of what the commands give at small size, and files made by an earlier version."""
