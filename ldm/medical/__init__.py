"""Medical files: DICOM, NIfTI and grey images of 16 bits, read as float values, one slice at a time."""
