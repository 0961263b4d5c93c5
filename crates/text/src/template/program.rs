//! A template's instructions, with guards where minijinja's fuel does not look.
//!
//! Fuel pays for what a template makes, by size. It does not see how deep values lie inside of each other, nor how
//! long the text of a list is that holds one string many times. So what is kept or compared is weighed first, and what
//! becomes text becomes it through filters of ours (`guards.rs`).

use std::collections::BTreeMap;

use minijinja::{
    Error, ErrorKind,
    machinery::{CodeGenerator, Instruction, Instructions, Token, parse, tokenize},
    syntax::SyntaxConfig,
};

/// Most tokens between `{{` and `}}` or `{%` and `%}`: what stands behind each other there is parsed, compiled and
/// freed by recursion.
const TAG_TOKENS_MAX: usize = 1000;
/// Most `elif`s, each of which lies inside of the one before it.
const ELIFS_MAX: usize = 250;
/// Names of our filters that no template can write.
pub(super) const HELD: &str = "held-value";
pub(super) const ATTRIBUTE: &str = "held-attribute";
pub(super) const CONCAT: &str = "concatenation";
/// minijinja's mark of a filter that is looked up each time.
const NOT_CACHED: u8 = !0;
const NAME: &str = "chat";

pub(super) type Blocks<'s> = BTreeMap<&'s str, Instructions<'s>>;

/// The instructions of a template and of its blocks.
///
/// # Errors
/// The line of a syntax error; what is too large to be compiled.
pub(super) fn compile(source: &str, syntax: SyntaxConfig) -> Result<(Instructions<'_>, Blocks<'_>), Error> {
    check_tags(source, syntax.clone())?;
    let tree = parse(source, NAME, syntax)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    let (main, blocks) = generator.finish();
    Ok((guarded(&main), blocks.iter().map(|(name, block)| (*name, guarded(block))).collect()))
}

fn check_tags(source: &str, syntax: SyntaxConfig) -> Result<(), Error> {
    let (mut tokens, mut elifs) = (0, 0);
    for token in tokenize(source, false, syntax) {
        match token?.0 {
            Token::TemplateData(_)
            | Token::VariableStart
            | Token::VariableEnd
            | Token::BlockStart
            | Token::BlockEnd => tokens = 0,
            Token::Ident("elif") => elifs += 1,
            _ => tokens += 1,
        }
        if tokens > TAG_TOKENS_MAX || elifs > ELIFS_MAX {
            return Err(Error::new(ErrorKind::SyntaxError, "one of its tags is too large"));
        }
    }
    Ok(())
}

fn guarded<'s>(plain: &Instructions<'s>) -> Instructions<'s> {
    let all: Vec<&Instruction<'s>> = (0..).map_while(|at| plain.get(at)).collect();
    // Where each of them goes to; whoever jumps to one meets its guard first.
    let mut end = 0;
    let mut places: Vec<u32> = Vec::with_capacity(all.len() + 1);
    for instruction in &all {
        places.push(end);
        end += 1 + guard(instruction).len() as u32;
    }
    places.push(end);
    let mut out = Instructions::new(plain.name(), plain.source());
    for (at, instruction) in all.into_iter().enumerate() {
        let line = plain.get_line(at as u32).unwrap_or_default() as u16;
        for before in guard(instruction) {
            out.add_with_line(before, line);
        }
        out.add_with_line(moved(instruction, &places), line);
    }
    out
}

/// What is done before an instruction with the top of the stack.
fn guard<'s>(instruction: &Instruction<'s>) -> Vec<Instruction<'s>> {
    match instruction {
        Instruction::StoreLocal(_)
        | Instruction::Eq
        | Instruction::Ne
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => vec![Instruction::ApplyFilter(HELD, Some(1), NOT_CACHED)],
        // The namespace lies above the value.
        Instruction::SetAttr(_) => vec![
            Instruction::Swap,
            Instruction::ApplyFilter(ATTRIBUTE, Some(1), NOT_CACHED),
            Instruction::Swap,
        ],
        _ => Vec::new(),
    }
}

fn moved<'s>(instruction: &Instruction<'s>, places: &[u32]) -> Instruction<'s> {
    let place = |at: &u32| places[*at as usize];
    match instruction {
        Instruction::Iterate(at) => Instruction::Iterate(place(at)),
        Instruction::Jump(at) => Instruction::Jump(place(at)),
        Instruction::JumpIfFalse(at) => Instruction::JumpIfFalse(place(at)),
        Instruction::JumpIfFalseOrPop(at) => Instruction::JumpIfFalseOrPop(place(at)),
        Instruction::JumpIfTrueOrPop(at) => Instruction::JumpIfTrueOrPop(place(at)),
        Instruction::BuildMacro(name, at, flags) => Instruction::BuildMacro(name, place(at), *flags),
        Instruction::StringConcat => Instruction::ApplyFilter(CONCAT, Some(2), NOT_CACHED),
        other => other.clone(),
    }
}
