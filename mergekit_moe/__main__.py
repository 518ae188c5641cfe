"""`python -m mergekit_moe`, and what `accelerate launch -m mergekit_moe` starts."""

from mergekit_moe.cli import main

if __name__ == "__main__":
    main()
