"""MedicalNet networks and their weight files; imported by `hubconf.py`."""
