"""Authority weight and provenance entropy of each record: computed, checked and written."""
