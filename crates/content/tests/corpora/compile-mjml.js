// Compiles every MJML document below a directory: node compile-mjml.js COMPILER FROM INTO.
// What the compiler refuses is left out; the test that reads the results counts them.
'use strict'
const fs = require('fs')
const path = require('path')

global.window = global // the compiler's bundle is made for browsers
const compile = require(path.resolve(process.argv[2]))
const [from, into] = process.argv.slice(3)

for (const name of fs.readdirSync(from, { recursive: true })) {
  if (!name.endsWith('.mjml') || !fs.statSync(path.join(from, name)).isFile()) continue
  try {
    const { html } = compile(fs.readFileSync(path.join(from, name), 'utf8'), { validationLevel: 'soft' })
    fs.writeFileSync(path.join(into, path.basename(name, '.mjml') + '.html'), html)
  } catch (error) {
    console.error(`${name}: ${error.message}`)
  }
}
