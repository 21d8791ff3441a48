"""The figures of the README, measured side by side; `make bench` prints them."""
