//! What tells one curve from another.

/// Okabe and Ito's palette, from the darkest, without its yellow, which paper swallows: red, green and blue.
pub(crate) const COLOURS: [[u8; 3]; 7] =
    [[0, 0, 0], [0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [230, 159, 0]];
