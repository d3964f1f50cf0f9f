"""Where pictures, captions and masks come from: folders, metadata files, columns, hubs -> image records."""
