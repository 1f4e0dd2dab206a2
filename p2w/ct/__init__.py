"""CT scans as files and folders hold them: found, read and turned to one orientation. No torch."""
