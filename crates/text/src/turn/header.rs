//! What stands before a call's arguments: its name, and in Kimi's format its id.

use super::format::CallStyle;

/// Longest name or id of a call; more is no header.
const HEADER_BYTES_MAX: usize = 512;
const FENCE: &str = "```json\n";

/// A call's beginning while it is read.
#[derive(Debug, Default)]
pub(super) struct Header {
    /// Everything, marks too: it is given back as content when it is no header.
    pub(super) raw: String,
    text: String,
    /// The kind of call was read, in the fenced style.
    separated: bool,
}

/// What a piece of it led to.
pub(super) enum Progress {
    More,
    /// A call begins; the text behind its header belongs to the arguments.
    Begins {
        name: String,
        id: Option<String>,
        rest: String,
    },
    Broken,
}

impl Header {
    pub(super) fn new(raw: String) -> Self {
        Self { raw, ..Self::default() }
    }

    pub(super) fn text(&mut self, style: CallStyle, text: &str) -> Progress {
        self.raw.push_str(text);
        self.text.push_str(text);
        let end = match style {
            CallStyle::Fenced if self.separated => FENCE,
            CallStyle::Dsml => "\">",
            _ => "",
        };
        let Some((head, rest)) = self.text.split_once(end).filter(|_| !end.is_empty()) else {
            return if self.text.len() > HEADER_BYTES_MAX { Progress::Broken } else { Progress::More };
        };
        begins(head, None, rest)
    }

    pub(super) fn separator(&mut self, style: CallStyle, spelled: &str) -> Progress {
        self.raw.push_str(spelled);
        match style {
            CallStyle::Plain => begins(&self.text, None, ""),
            CallStyle::Kimi => kimi(&self.text),
            CallStyle::Fenced if !self.separated && self.text.trim() == "function" => {
                self.separated = true;
                self.text.clear();
                Progress::More
            }
            CallStyle::Fenced | CallStyle::Dsml => Progress::Broken,
        }
    }
}

fn begins(name: &str, id: Option<&str>, rest: &str) -> Progress {
    let name = name.trim();
    let known = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    if name.is_empty() || name.len() > HEADER_BYTES_MAX || !name.chars().all(known) {
        return Progress::Broken;
    }
    Progress::Begins { name: name.into(), id: id.map(Into::into), rest: rest.into() }
}

/// `functions.NAME:INDEX`.
fn kimi(header: &str) -> Progress {
    let id = header.trim();
    let name = id.rsplit_once(':').filter(|(_, index)| index.parse::<u32>().is_ok()).map(|(name, _)| name);
    match name {
        Some(name) => begins(name.strip_prefix("functions.").unwrap_or(name), Some(id), ""),
        None => Progress::Broken,
    }
}
