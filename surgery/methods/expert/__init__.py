"""Operations on the experts of a mixture: `moesurg expert NAME`, one file each."""
