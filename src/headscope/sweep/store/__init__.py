"""What lasts: a run directory, written whole or not at all.

Reading order: seals (checksums), store (the directory), claims (who works on which unit), rows (numbers as tables), run
(reading it), sheet (its images on a page)."""
