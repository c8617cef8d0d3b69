"""What ELITE costs, always side by side with what it is compared with; `make bench` runs all."""

from elite.console import quiet_libraries

quiet_libraries()  # before anything here imports them
