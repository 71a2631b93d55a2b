"""The seams to PEFT and transformers: the only files that touch private names of those packages."""

from .private_peft_names import check_imports

check_imports()
