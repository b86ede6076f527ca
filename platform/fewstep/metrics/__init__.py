"""What a set of images is worth: one metric, one file; a score says what it was measured with."""
