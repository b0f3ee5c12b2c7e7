"""Train the U-Net on noised latents (or pixels) under frozen text embeddings."""

from ldm.stages import train_command

main = train_command("ldm", __doc__)

if __name__ == "__main__":
    main()
