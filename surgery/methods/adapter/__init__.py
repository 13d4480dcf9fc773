"""Operations on adapters: `moesurg adapter NAME`, one file each."""
