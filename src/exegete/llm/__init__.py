"""Language models that explain and judge."""
