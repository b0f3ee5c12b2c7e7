"""Train a small OpenCLIP from nothing on the images and captions of a data set."""

from ldm.stages import train_command

main = train_command("clip", __doc__)

if __name__ == "__main__":
    main()
