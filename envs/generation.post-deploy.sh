#!/bin/sh
# Snakemake runs this in the new environment, with the place of the checkout in SNELLA_CHECKOUT.
exec python -m pip install --quiet --no-deps --editable "${SNELLA_CHECKOUT:-$PWD}"
