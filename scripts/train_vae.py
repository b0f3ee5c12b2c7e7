"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

from ldm.stages import train_command

main = train_command("vae", __doc__)

if __name__ == "__main__":
    main()
