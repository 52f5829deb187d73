"""The bundled models, the world they were trained on, and how: see README.md here."""
