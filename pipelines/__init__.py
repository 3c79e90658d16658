"""Jobs that take tables to tables: Ray Data drives them, Lance keeps what they make."""
