"""`python -m flora.cli`, for launchers such as `accelerate launch -m flora.cli`."""

from flora.cli import main

if __name__ == "__main__":
    main(prog_name="flora")
