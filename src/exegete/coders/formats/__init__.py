"""One reader per on-disk format of sparse coders."""
