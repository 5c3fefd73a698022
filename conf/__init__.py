"""The Hydra configuration of `topkast-train`, shipped as `lightning_topkast.conf`."""
