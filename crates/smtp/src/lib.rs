//! SMTP client and server sessions and the reply parser, without I/O.
