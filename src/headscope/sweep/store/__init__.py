"""A run directory, in which every file is whole or absent.

Reading order: manifest (what a run is); store (the files of its units); rows (a unit's numbers as a table); seals
(checksums); claims (which process works on which unit); room (full disks); run (reading a run); sheet (its images).
"""
