"""Write drawn heads as DICOM series or NIfTI volumes with captions, to try what reads medical files on."""

from ldm.cli import command
from ldm.data.sources.phantom_files import ExportPhantomConfig, export_phantom

main = command(ExportPhantomConfig, export_phantom, __doc__)

if __name__ == "__main__":
    main()
