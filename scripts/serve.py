"""Serve a page to generate with, in a browser: http://127.0.0.1:7860."""

from ldm.cli import command

try:
    from ldm.server.serve import ServeConfig, serve
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: run `pip install 'ldm[web]'`") from None

main = command(ServeConfig, serve, __doc__)

if __name__ == "__main__":
    main()
