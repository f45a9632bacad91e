"""What only the embedded default needs: rendered and bundled data, and its pre-trained models."""
