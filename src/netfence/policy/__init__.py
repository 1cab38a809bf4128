"""What an attachment is held to, as pure immutable values; see design.md, "The two big ideas"."""
