//! Every op in scalar code.
