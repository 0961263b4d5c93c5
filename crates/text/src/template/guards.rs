//! Filters, methods and text that pay for what they make before they make it.

use std::{
    fmt::{self, Write as _},
    io,
    sync::Arc,
};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter,
    value::{Kwargs, Rest, ValueIter, ValueKind, ValueOrKwargs},
};

use super::program::{ATTRIBUTE, CONCAT, HELD};

/// Deepest nesting of values: nested values are freed, compared and written by recursion.
const DEPTH_MAX: usize = 128;
/// Values of a list or map that are looked at for one instruction's fuel.
const VALUES_PER_FUEL: usize = 4;
/// Bytes that one fuel pays for, as in minijinja.
const BYTES_PER_FUEL: usize = 64;
/// Longest text of a number.
const NUMBER_BYTES_MAX: usize = 400;

/// Filters that make text of what they are given: only text and numbers may come in.
const TEXT_FILTERS: [(&str, Cost); 12] = [
    ("upper", |state, args| pay(state, 2 * length(args, 0))),
    ("lower", |state, args| pay(state, 2 * length(args, 0))),
    ("title", |state, args| pay(state, 2 * length(args, 0))),
    ("capitalize", |state, args| pay(state, 2 * length(args, 0))),
    ("trim", |state, args| pay(state, length(args, 0))),
    ("escape", |state, args| pay(state, 6 * length(args, 0))),
    ("e", |state, args| pay(state, 6 * length(args, 0))),
    ("urlencode", |state, args| pay(state, 3 * length(args, 0))),
    ("replace", |state, args| pay(state, replaced(args))),
    ("split", |state, args| pay_pieces(state, text(args, 0), text(args, 1))),
    ("lines", |state, args| pay_pieces(state, text(args, 0), "\n")),
    ("format", |state, args| pay_format(state, '%', args)),
];

/// Filters that compare what they are given, a number of times that grows with it.
const ORDER_FILTERS: [&str; 6] = ["sort", "unique", "min", "max", "groupby", "dictsort"];

type Cost = fn(&State, &[Value]) -> Result<(), Error>;

/// Puts the guards into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    // minijinja's own filters, of a time before ours stood in their places.
    let plain = Arc::new(environment.clone());
    for (name, cost) in TEXT_FILTERS {
        let plain = Arc::clone(&plain);
        let filter = move |state: &mut State, args: Rest<ValueOrKwargs>| -> Result<Value, Error> {
            let args = args.into_values();
            args.iter().try_for_each(|v| only_text(name, v))?;
            cost(state, &args)?;
            plain.empty_state().apply_filter(name, &args)
        };
        environment.add_filter(name, filter);
    }
    for name in ORDER_FILTERS {
        let plain = Arc::clone(&plain);
        let filter = move |state: &mut State, args: Rest<ValueOrKwargs>| -> Result<Value, Error> {
            let args = args.into_values();
            let values: usize = args.iter().map(|v| weigh(state, v, false)).sum::<Result<_, _>>()?;
            state.consume_fuel(2 * values as u64)?;
            plain.empty_state().apply_filter(name, &args)
        };
        environment.add_filter(name, filter);
    }
    environment.add_filter("indent", indent(plain));
    environment.add_filter("string", |state: &mut State, value: Value| to_text(state, &value));
    environment.add_filter("pprint", |state: &mut State, value: Value| -> Result<Value, Error> {
        let mut out = Paid::new(state);
        write!(out, "{value:#?}").map_err(|_| out_of_fuel())?;
        out.into_value()
    });
    environment.add_filter("join", join_filter);
    environment.add_filter(HELD, |state: &mut State, value: Value| -> Result<Value, Error> {
        weigh(state, &value, false).map(|_| value)
    });
    environment.add_filter(ATTRIBUTE, |state: &mut State, value: Value| -> Result<Value, Error> {
        weigh(state, &value, true)?;
        // What is made of a namespace when it is looked at may hold it.
        Ok(if value.kind() == ValueKind::Iterable { value.try_iter()?.collect() } else { value })
    });
    environment.add_filter(CONCAT, |state: &mut State, left: Value, right: Value| -> Result<Value, Error> {
        let mut out = Paid::new(state);
        write!(out, "{left}{right}").map_err(|_| out_of_fuel())?;
        out.into_value()
    });
    environment.set_unknown_method_callback(method);
    environment.set_formatter(format);
}

/// Text that is paid for before it grows.
pub(super) struct Paid<'a, 't, 'e> {
    state: &'a State<'t, 'e>,
    bytes: Vec<u8>,
    unpaid: usize,
}

impl<'a, 't, 'e> Paid<'a, 't, 'e> {
    pub(super) fn new(state: &'a State<'t, 'e>) -> Self {
        Self { state, bytes: Vec::new(), unpaid: 0 }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.unpaid += bytes.len();
        pay(self.state, self.unpaid)?;
        self.unpaid %= BYTES_PER_FUEL;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn into_value(self) -> Result<Value, Error> {
        let text = String::from_utf8(self.bytes);
        text.map(Value::from).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
    }
}

impl fmt::Write for Paid<'_, '_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

impl io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn out_of_fuel() -> Error {
    Error::from(ErrorKind::OutOfFuel)
}

fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)
}

/// How many values lie in one, itself included; each way to a value counts. Values that are too deep are refused, with
/// `data` those too that could hold a namespace and so make a ring that is never freed.
fn weigh(state: &State, value: &Value, data: bool) -> Result<usize, Error> {
    let mut values = 1;
    let mut open: Vec<(ValueKind, Value, ValueIter)> = Vec::new();
    let mut next = Some(value.clone());
    loop {
        if let Some(value) = next.take() {
            let kind = value.kind();
            if data {
                check_data(&value, open.is_empty())?;
            }
            if matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
                let items = value.try_iter()?;
                open.push((kind, value, items));
            }
            if open.len() > DEPTH_MAX {
                return Err(Error::new(ErrorKind::InvalidOperation, "values are nested too deep"));
            }
        }
        let Some((kind, holder, items)) = open.last_mut() else { return Ok(values) };
        let Some(item) = items.next() else {
            open.pop();
            continue;
        };
        values += 1;
        // What is made anew each time that it is looked at takes longer.
        if values % VALUES_PER_FUEL == 0 || *kind == ValueKind::Iterable {
            state.consume_fuel(1)?;
        }
        next = Some(if *kind == ValueKind::Map { holder.get_item(&item)? } else { item });
    }
}

/// Refuses what may hold a namespace.
fn check_data(value: &Value, outermost: bool) -> Result<(), Error> {
    let holds = |o: &str| o.contains("Namespace") || o.contains("::vm::");
    let lazy = value.kind() == ValueKind::Iterable && !outermost;
    if lazy || value.as_object().is_some_and(|o| holds(o.type_name())) {
        return Err(Error::new(ErrorKind::InvalidOperation, "only data can be kept in a namespace"));
    }
    Ok(())
}

fn only_text(filter: &str, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if !value.is_kwargs() => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{filter} takes text")))
        }
        _ => Ok(()),
    }
}

fn text(args: &[Value], at: usize) -> &str {
    args.get(at).and_then(Value::as_str).unwrap_or_default()
}

fn length(args: &[Value], at: usize) -> usize {
    args.get(at).and_then(Value::as_str).map_or(NUMBER_BYTES_MAX, str::len)
}

/// The longest that a replacement can become.
fn replaced(args: &[Value]) -> usize {
    let (text, from, to) = (length(args, 0), length(args, 1), length(args, 2));
    (text / from.max(1) + 1).saturating_mul(to).saturating_add(text)
}

/// Pieces of a text are values of their own.
fn pay_pieces(state: &State, text: &str, separator: &str) -> Result<(), Error> {
    let pieces = match separator {
        "" => text.split_whitespace().count(),
        separator => text.matches(separator).count() + 1,
    };
    state.consume_fuel(pieces as u64)
}

/// Every field may hold the longest value and be as wide as the largest number in the pattern.
fn pay_format(state: &State, field: char, args: &[Value]) -> Result<(), Error> {
    let pattern = text(args, 0);
    let fields = pattern.matches(field).count();
    let numbers = pattern.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
    let mut longest = numbers.map(|n| n.parse().unwrap_or(usize::MAX)).max().unwrap_or(0).saturating_mul(4);
    for arg in args.iter().skip(1) {
        if arg.is_kwargs() {
            for name in arg.try_iter()? {
                longest = longest.max(checked_length(&arg.get_item(&name)?)?);
            }
        } else {
            longest = longest.max(checked_length(arg)?);
        }
    }
    pay(state, fields.saturating_mul(longest.saturating_add(NUMBER_BYTES_MAX)))
}

fn checked_length(value: &Value) -> Result<usize, Error> {
    only_text("format", value)?;
    // A number can be a width, too.
    Ok(length(std::slice::from_ref(value), 0).max(value.as_usize().unwrap_or(0).saturating_mul(4)))
}

fn indent(
    plain: Arc<Environment<'static>>,
) -> impl Fn(&mut State, Rest<ValueOrKwargs>) -> Result<Value, Error> {
    move |state, args| {
        let args = args.into_values();
        args.iter().try_for_each(|v| only_text("indent", v))?;
        let named = args.last().filter(|v| v.is_kwargs()).and_then(|k| k.get_attr("width").ok());
        let width = args.get(1).and_then(Value::as_usize).or(named.and_then(|v| v.as_usize())).unwrap_or(4);
        let lines = text(&args, 0).matches('\n').count() + 1;
        pay(state, lines.saturating_mul(width).saturating_add(length(&args, 0)))?;
        plain.empty_state().apply_filter("indent", &args)
    }
}

fn to_text(state: &State, value: &Value) -> Result<Value, Error> {
    if value.as_str().is_some() {
        return Ok(value.clone());
    }
    let mut out = Paid::new(state);
    write!(out, "{value}").map_err(|_| out_of_fuel())?;
    out.into_value()
}

#[allow(clippy::needless_pass_by_value, reason = "the engine's signature")]
fn join_filter(
    state: &mut State,
    values: Value,
    separator: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let separator = match separator {
        Some(separator) => Some(separator),
        None => options.get("d")?,
    };
    let attribute: Option<String> = options.get("attribute")?;
    options.assert_all_used()?;
    let separator = separator.map_or(String::new(), |s| s.as_str().map_or_else(String::new, Into::into));
    join(state, &separator, &values, attribute.as_deref())
}

fn join(state: &State, separator: &str, values: &Value, attribute: Option<&str>) -> Result<Value, Error> {
    let mut out = Paid::new(state);
    for (at, value) in values.try_iter()?.checked().enumerate() {
        state.consume_fuel(1)?;
        let value = match attribute {
            Some(attribute) => value?.get_attr(attribute)?,
            None => value?,
        };
        let separator = if at > 0 { separator } else { "" };
        write!(out, "{separator}{value}").map_err(|_| out_of_fuel())?;
    }
    out.into_value()
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(s) = value.as_str() {
        match name {
            "join" if args.len() == 1 => return join(state, s, &args[0], None),
            "split" => pay_pieces(state, s, text(args, 0))?,
            "splitlines" => pay_pieces(state, s, "\n")?,
            "upper" | "lower" | "title" | "capitalize" => pay(state, 2 * s.len())?,
            "format" => {
                let all: Vec<Value> = std::iter::once(value.clone()).chain(args.iter().cloned()).collect();
                pay_format(state, '{', &all)?;
            }
            _ => {}
        }
    } else if name == "count" {
        weigh(state, value, false)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if value.as_object().is_none() {
        return escape_formatter(out, state, value);
    }
    let text = to_text(state, value)?;
    out.write_str(text.as_str().unwrap_or_default()).map_err(Error::from)
}
