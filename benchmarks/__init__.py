"""Measurements that anyone can repeat: each folder or script says what it needs and prints what it found."""
