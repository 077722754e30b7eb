"""`python -m chaindiff`, as `torchrun -m chaindiff` and `accelerate launch -m chaindiff` call it."""

from chaindiff.cli import main

if __name__ == "__main__":
    main()
