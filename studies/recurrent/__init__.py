"""Studies of recurrent models beside a transformer: steering, lenses and latent knowledge, on models trained here."""
