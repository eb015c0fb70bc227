"""A bilingual world of diseases and findings in which the truth is known: illustrative, not for care."""
