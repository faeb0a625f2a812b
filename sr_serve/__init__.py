"""What becomes of a trained model: scored, compared, promoted, imported, applied to many images, served."""
