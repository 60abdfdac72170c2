"""The reference networks, their data and the script that trains them: ``python -m models.train``."""
