//! Models in several files: `NAME-00001-of-00003.gguf` and so on, the metadata in the first.

use std::path::Path;

use oxseek_tensor::ByteRegion;

use super::{Gguf, reader::Part};
use crate::{Error, mmap};

/// Most parts of a model: ten times those of the largest there is.
const PARTS_MAX: usize = 1000;
const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// A file name of a part, taken apart.
struct PartName<'a> {
    stem: &'a str,
    count: usize,
}

impl<'a> PartName<'a> {
    /// `None` for the name of a model in one file.
    fn parse(name: &'a str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five = |digits: &str| digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        let (number, count) = (five(number).then_some(number)?, five(count).then_some(count)?);
        let (number, count) = (number.parse::<usize>().ok()?, count.parse().ok()?);
        (1..=count).contains(&number).then_some(Self { stem, count })
    }

    fn of(&self, number: usize) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

/// Maps the file at `path`, and the other parts when its name is that of a part.
pub(super) fn map_all(path: &Path) -> Result<Vec<(String, ByteRegion)>, Error> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(part) = PartName::parse(&name) else { return Ok(vec![(name, mmap::map(path)?)]) };
    if part.count > PARTS_MAX {
        let why = format!("{} parts, at most {PARTS_MAX} are allowed", part.count);
        return Err(Error::File { file: name, why });
    }
    let mut files = Vec::with_capacity(part.count);
    for number in 1..=part.count {
        let file = part.of(number);
        let path = path.with_file_name(&file);
        if !path.exists() {
            let why = format!("is missing, part {number} of {}: is the download complete?", part.count);
            return Err(Error::File { file, why });
        }
        files.push((file, mmap::map(&path)?));
    }
    Ok(files)
}

/// The models of a folder by their file names; of a model in parts the first.
pub(crate) fn models_in(names: &[String]) -> Vec<&String> {
    let is_gguf = |n: &str| Path::new(n).extension().is_some_and(|e| e == "gguf");
    let first = |n: &&String| PartName::parse(n).is_none_or(|part| part.of(1) == **n);
    names.iter().filter(|n| is_gguf(n)).filter(first).collect()
}

/// The parts by their number, each there once.
pub(super) fn in_order(parts: Vec<Part>) -> Result<Vec<Part>, Error> {
    let count = parts.len();
    let mut slots: Vec<Option<Part>> = Vec::new();
    slots.resize_with(count, || None);
    for part in parts {
        let bad = |key: &str, why: String| Error::Key { file: part.file.clone(), key: key.into(), why };
        let whole = |key: &str, default: usize| match part.metadata.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_i64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| bad(key, format!("expected a whole number, found {}", value.brief()))),
        };
        // Files that were never split have neither key, or a count of 0 or 1.
        let found = whole(COUNT, 1)?.max(1);
        if found != count {
            return Err(bad(COUNT, format!("the model has {found} parts, {count} are given")));
        }
        let number = whole(NUMBER, 0)?;
        match slots.get_mut(number) {
            Some(slot @ None) => *slot = Some(part),
            Some(Some(other)) => {
                return Err(bad(NUMBER, format!("found {number}, as in {}", other.file)));
            }
            None => return Err(bad(NUMBER, format!("found {number}, expected less than {count}"))),
        }
    }
    // As many parts as places, none of them twice: every place is taken.
    Ok(slots.into_iter().flatten().collect())
}

/// As many tensors as the model had before it was split.
pub(super) fn check_count(model: &Gguf) -> Result<(), Error> {
    let Some(value) = model.get(TENSORS) else { return Ok(()) };
    let found = model.part_of.len();
    if value.as_i64() == i64::try_from(found).ok() {
        return Ok(());
    }
    Err(model.key_error(TENSORS, format!("{} tensors, found {found}", value.brief())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_taken_apart() {
        let part = PartName::parse("DeepSeek-V3-Q4_K_M-00002-of-00009.gguf").unwrap();
        assert_eq!((part.stem, part.count), ("DeepSeek-V3-Q4_K_M", 9));
        assert_eq!(part.of(1), "DeepSeek-V3-Q4_K_M-00001-of-00009.gguf");
        for name in [
            "model.gguf",
            "m-1-of-2.gguf",
            "m-00003-of-00002.gguf",
            "m-00000-of-00002.gguf",
            "m-0000a-of-00002.gguf",
            "m-00001-of-00002.bin",
            "00001-of-00002.gguf",
        ] {
            assert!(PartName::parse(name).is_none(), "{name}");
        }
    }

    #[test]
    fn a_folder_has_as_many_models_as_first_parts() {
        let names = ["a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "c.txt"].map(String::from);
        assert_eq!(models_in(&names), ["a.gguf", "b-00001-of-00002.gguf"]);
    }
}
