"""The seams to PEFT and transformers: the only files that touch private names of those packages."""
