"""Text as token ids: vocabularies, Chinese, the token table."""
